"""From a name to filled networks: where the files are, what they say, and whether they can be trusted.

source (a name -> local files), files (safetensors and JSON, headers first), fields and configs (config.json -> our
dataclasses), names (old spellings), wrapping (what stands before names), ldm (single files' names), taesd (the tiny
autoencoder's two files), detect (what a file looks like), pipeline (model_index.json, calotype.json), folder and
single_file (a model's two layouts), texts (the configs that single files lack), load, inspect; control, control_files,
motion (adapters); write, convert, unpickle (from one layout to another).
"""
