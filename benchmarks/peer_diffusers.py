"""What cold_start.py compares calotype with: the same picture by diffusers, its leanest way.

python benchmarks/peer_diffusers.py FOLDER PROMPT -o OUT.png --steps N --guidance G --seed S [--eta E]
"""

import argparse

import torch
from diffusers import DiffusionPipeline

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("prompt")
parser.add_argument("-o", dest="output", required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--guidance", type=float, required=True)
parser.add_argument("--seed", type=int, required=True)
parser.add_argument("--eta", type=float, default=0.0, help="of TCD's scheduler: calotype's gamma")
args = parser.parse_args()

pipeline = DiffusionPipeline.from_pretrained(
    args.folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
)
pipeline.set_progress_bar_config(disable=True)
result = pipeline(
    args.prompt,
    num_inference_steps=args.steps,
    guidance_scale=args.guidance,
    eta=args.eta,
    generator=torch.Generator().manual_seed(args.seed),
)
result.images[0].save(args.output)
