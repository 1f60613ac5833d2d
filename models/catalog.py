"""The model families we run natively, by the `_class_name` of `model_index.json`. Torch-free."""

from collections.abc import Mapping

FAMILIES: Mapping[str, str] = {
    "FluxPipeline": "sgl_diffusion.models.flux:Flux1",
    "WanPipeline": "sgl_diffusion.models.wan:Wan",
    "WanImageToVideoPipeline": "sgl_diffusion.models.wan:Wan",
    "WanDMDPipeline": "sgl_diffusion.models.wan:DistilledWan",
}

# families whose denoiser alone is native so far: their pipelines run on the diffusers backend
DENOISERS: Mapping[str, str] = {
    "QwenImagePipeline": "sgl_diffusion.models.qwen_image:QwenImage",
}
