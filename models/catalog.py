"""The model families we run natively, by the `_class_name` of `model_index.json`. Torch-free."""

from collections.abc import Mapping

FAMILIES: Mapping[str, str] = {
    "FluxPipeline": "sgl_diffusion.models.flux:Flux1",
    "Flux2Pipeline": "sgl_diffusion.models.flux2:Flux2",
    "Flux2KleinPipeline": "sgl_diffusion.models.flux2:Flux2Klein",
    "WanPipeline": "sgl_diffusion.models.wan:Wan",
    "WanImageToVideoPipeline": "sgl_diffusion.models.wan:Wan",
    "WanDMDPipeline": "sgl_diffusion.models.wan:DistilledWan",
    "QwenImagePipeline": "sgl_diffusion.models.qwen_image:QwenImage",
    "QwenImageEditPipeline": "sgl_diffusion.models.qwen_image:QwenImageEdit",
    "QwenImageEditPlusPipeline": "sgl_diffusion.models.qwen_image:QwenImageEditPlus",
    "ZImagePipeline": "sgl_diffusion.models.z_image:ZImage",
}
