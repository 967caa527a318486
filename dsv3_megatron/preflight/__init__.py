"""Check a GPU job's launch line before the job: `dsv3 preflight torchrun … -m dsv3_megatron.train …`.

Everything that happens before the first step is done as the job would do it, without its machines: arguments are
completed, refused or validated, Megatron is patched, its groups are made at the job's size, and the model is built on
the meta device. Which machine is meant is data (`machine.Machine`). docs/preflight.md.
"""
