"""`dsv3 plan serve`: what a layout for serving would do, before its GPUs are rented (docs/deployment.md).

job.py        what is served: model, layout, phase, context, precision, drafts
memory.py     weights and cache of a GPU; the most requests
time.py       seconds of a forward pass: each layer's products, cache, messages
result.py     latency and throughput of a job, and of the same without copies or drafts
published.py  what others measured, as jobs: every one a judge, none fitted
__main__.py   the command
"""
