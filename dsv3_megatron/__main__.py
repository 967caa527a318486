"""`python -m dsv3_megatron <verb>`."""

from dsv3_megatron.cli import main

raise SystemExit(main())
