"""`dsv3 adopt`: what a launch script of Megatron-LM, or of a fork, becomes under `--spec dsv3`.

shell.py       reads a shell script without running it (tokens.py, syntax.py, expand.py: as a shell would)
zoo.py         reads a YAML model configuration of Megatron-MoE-ModelZoo
foreign.toml   options of MindSpeed, Pai-Megatron-Patch, ModelZoo and ROCm, and what they are called in Megatron
translate.py   from the script's options to Megatron's, one by one, with reasons
line.py        from Megatron's options to the line of `--spec dsv3`, checked as a run would be
"""
