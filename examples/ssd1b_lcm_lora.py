"""SSD-1B with its own LCM-LoRA; SDXL's would not fit."""

import typer

import calotype


def main(
    prompt: str = "a lighthouse keeper reading at his window, oil painting",
    model: str = "segmind/SSD-1B",
    lora: str = "latent-consistency/lcm-lora-ssd-1b",
    size: int = 1024,
    out: str = "ssd1b_lcm_lora.png",
) -> None:
    engine = calotype.load(model)
    engine.add_lora(lora)
    result = engine(prompt, sampler="lcm", steps=4, guidance=1.0, seed=42, width=size, height=size)
    print(*result.save(out))


if __name__ == "__main__":
    typer.run(main)
