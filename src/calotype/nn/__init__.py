"""The networks, in plain PyTorch. Parameters are named as in diffusers' and transformers' checkpoints, so that a
folder loads with no conversion. Nothing here knows of files, devices or model families.
"""
