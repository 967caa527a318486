"""`make demo-longctx`: a tiny model is extended to eight times its context, with and without YaRN."""
