"""sft-dist: one supervised fine-tuning run, from a laptop's CPU to a multi-node SLURM job, from the same YAML."""

__version__ = "0.1.0"
