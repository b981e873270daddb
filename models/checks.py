"""Checks of what users give to a backbone; each raises `UserError` with what is allowed."""

from torch import Tensor

from errors import UserError

NUMBERS = ("ffn_ratio", "layerscale", "drop_path", "norm_eps", "rope_base", "rope_shift")
NUMBERS += ("rope_jitter", "rope_rescale")
LEAST = {"embed_dim": 1, "depth": 1, "num_heads": 1, "patch_size": 1, "in_channels": 1}
LEAST |= {"registers": 0}
CHOICES = {
    "positions": ("learned", "rope"),
    "interpolation": ("offset", "size", "antialias"),
    "drop_path_shape": ("uniform", "linear"),
    "fit": ("crop", "pad"),
}


def check_vit_options(options: dict) -> None:
    """Refuses the first of all options of `VisionTransformer` that is out of range."""
    for name, least in LEAST.items():
        value = options[name]
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r}; it must be a whole number from {least} on")
    dim, heads = options["embed_dim"], options["num_heads"]
    if dim % heads:
        raise UserError(f"embed_dim {dim} is not a multiple of num_heads {heads}")
    size, patch = options["image_size"], options["patch_size"]
    if len(size) != 2 or not all(isinstance(side, int) and side >= patch for side in size):
        raise UserError(f"image_size is {size}; it must be one or two numbers from {patch} on")
    for name in NUMBERS:
        if not isinstance(options[name], (int, float, type(None))):
            raise UserError(f"{name} is {options[name]!r}; it must be a number")
    for name, allowed in CHOICES.items():
        check_choice(name, options[name], allowed)
    if not 0 <= options["drop_path"] < 1:
        raise UserError(f"drop_path is {options['drop_path']}; it must lie in [0, 1)")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def check_masks(masks: Tensor, patches: Tensor, mask_token: Tensor | None) -> None:
    """Refuses masks of another shape than (B, N) of `patches` (B, N, D)."""
    if mask_token is None:
        raise UserError("masks are given, but this backbone was built with mask_token=False")
    if masks.shape != patches.shape[:2]:
        shape, wanted = tuple(masks.shape), tuple(patches.shape[:2])
        raise UserError(f"masks of shape {shape} given; these images have (B, N) = {wanted}")


def check_images(images: Tensor, channels: int, smallest: int) -> None:
    """Refuses all but float images (B, `channels`, H, W) with sides of at least `smallest`."""
    if images.ndim != 4 or images.shape[1] != channels:
        shape = tuple(images.shape)
        raise UserError(f"images of shape {shape} given; this backbone takes (B, {channels}, H, W)")
    if not images.is_floating_point():
        raise UserError(f"images of {images.dtype} given; backbones take normalised floats")
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        size = f"{height} x {width}"
        raise UserError(f"images of {size} pixels given; the least is {smallest} a side")
