"""The model families we run natively, by the `_class_name` of `model_index.json`. Torch-free."""

FAMILIES = {
    "FluxPipeline": "sgl_diffusion.models.flux:Flux1",
}
