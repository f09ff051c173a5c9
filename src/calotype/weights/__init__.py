"""From a name to filled networks: where the files are, what they say, and whether they can be trusted.

source (a name -> local files), files (safetensors and JSON, headers first), fields and configs (config.json -> our
dataclasses), names (old spellings), detect (what a file looks like), pipeline (model_index.json, calotype.json), load,
inspect.
"""
