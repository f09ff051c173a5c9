"""Text to image with an LCM-LoRA: any fine-tuned SDXL model becomes a few-step one, without guidance."""

import typer

import calotype


def main(
    prompt: str = "a lighthouse keeper reading at his window, oil painting",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    lora: str = "latent-consistency/lcm-lora-sdxl",
    size: int = 1024,
    out: str = "text_lcm_lora.png",
) -> None:
    engine = calotype.load(model)
    engine.add_lora(lora)
    result = engine(prompt, sampler="lcm", steps=4, guidance=1.0, seed=42, width=size, height=size)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
