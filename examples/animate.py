"""AnimateDiff in a few steps: a motion adapter, and an LCM-LoRA mixed with a motion LoRA that zooms in."""

import typer

import calotype


def main(
    prompt: str = "a fox walking through a snowy forest, evening light",
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    motion: str = "guoyww/animatediff-motion-adapter-v1-5",
    lora: str = "latent-consistency/lcm-lora-sdv1-5",
    zoom: str = "guoyww/animatediff-motion-lora-zoom-in",
    frames: int = 24,
    size: int = 512,
    out: str = "animate.gif",
) -> None:
    engine = calotype.load(model)
    engine.set_motion(motion)
    engine.add_lora(lora, name="lcm")
    engine.add_lora(zoom, name="zoom-in")
    engine.set_loras({"lcm": 0.55, "zoom-in": 1.2})
    result = engine(prompt, frames=frames, sampler="lcm", steps=5, guidance=1.25, seed=0, width=size, height=size)
    print(*result.save(out))  # or .webp, .mp4


if __name__ == "__main__":
    typer.run(main)
