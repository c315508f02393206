"""Config: from YAML and the command line to one frozen, checked value.

schema      the fields, their types, defaults and documentation
yaml12      YAML 1.2 in and out
layers      recipes, files with what they extend, overrides
loader      layers -> Config, with the origin of each value
problems    what is wrong, a line for each mistake (spelling: what an unknown key was meant to be)
rules       what must hold between fields (sft_fields: what `train.extra` may set)
explain     the documented values, and the JSON Schema
"""
