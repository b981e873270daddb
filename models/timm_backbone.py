"""Any image model of timm as a backbone that returns `Features`."""

import difflib

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from errors import UserError
from models.checks import check_images
from models.features import Features, Preprocessing


class TimmBackbone(nn.Module):
    """A timm model without its classifier.

    A model with tokens gives its CLS token and patches, or its pooled output as `cls` if it has no
    such token. A convolutional net gives its last map as patches and their mean as `cls`, both
    through its last norm if there is one (as DINOv3 does with ConvNeXt).
    """

    def __init__(self, name: str, pretrained: bool = False, in_channels: int = 3, **kwargs):
        """
        Args:
            name: as timm lists it, e.g. "convnext_tiny" or "vit_small_patch16_224.dino".
            pretrained: fetches timm's weights.
            kwargs: anything else that `timm.create_model` takes for this model.

        Raises:
            UserError: if timm does not know the name or cannot build the model, with what it says.
        """
        super().__init__()
        self.config = {"name": name, "in_channels": in_channels, **kwargs}
        self.model = _create(name, pretrained, in_chans=in_channels, **kwargs)
        self.embed_dim = self.model.num_features
        self.patch_size = self.model.feature_info[-1]["reduction"]
        self.in_channels = in_channels
        self.crops = hasattr(self.model, "dynamic_img_size")

    @property
    def native_preprocessing(self) -> Preprocessing:
        """What timm's own evaluation of this model does."""
        data = resolve_model_data_config(self.model)
        height, width = data["input_size"][-2:]
        resize = int(max(height, width) / data["crop_pct"])
        mean, std = self._per_channel(data["mean"]), self._per_channel(data["std"])
        return Preprocessing((height, width), resize, mean, std, data["interpolation"])

    def _per_channel(self, rgb: tuple[float, ...]) -> tuple[float, ...]:
        """The statistics; their average for each channel if timm has those of another number."""
        if len(rgb) == self.in_channels:
            return tuple(rgb)
        return (sum(rgb) / len(rgb),) * self.in_channels

    def forward(self, images: Tensor, masks: Tensor | None = None, local: bool = False) -> Features:
        """
        Args:
            images: (B, C, H, W) normalised floats; ViTs take any size and crop the remainder that
                the patch size leaves, right and bottom.
            masks: must be None.
            local: without effect.

        Raises:
            UserError: if masks are given, or the images do not fit.
        """
        if masks is not None:
            name = self.config["name"]
            raise UserError(f"masks are given, but timm:{name} has no mask token; leave iBOT out")
        check_images(images, self.in_channels, self.patch_size if self.crops else 1)
        grid = h, w = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        if self.crops:
            images = images[..., : h * self.patch_size, : w * self.patch_size]
        try:
            output = self.model.forward_features(images)
        except RuntimeError as error:
            if "actual input size" not in str(error):
                raise
            size, name = f"{images.shape[-2]} x {images.shape[-1]}", self.config["name"]
            raise UserError(
                f"images of {size} pixels are too small for timm:{name}, its last map has none"
            ) from None
        return self._from_tokens(output, grid) if output.ndim == 3 else self._from_map(output)

    def _from_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Features:
        has_cls = getattr(self.model, "cls_token", None) is not None
        prefix = getattr(self.model, "num_prefix_tokens", int(has_cls))
        if tokens.shape[1] != prefix + grid[0] * grid[1]:
            name, count = self.config["name"], tokens.shape[1]
            raise UserError(f"timm:{name} gives {count} tokens, which are no grid of {grid}")
        if has_cls:
            cls, registers = tokens[:, 0], tokens[:, 1:prefix]
        else:
            cls, registers = self.model.forward_head(tokens, pre_logits=True), tokens[:, :prefix]
            tokens = getattr(self.model, "fc_norm", nn.Identity())(tokens)
        return Features(cls, registers, tokens[:, prefix:], grid)

    def _from_map(self, maps: Tensor) -> Features:
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            maps = maps.permute(0, 3, 1, 2)
        norm = getattr(getattr(self.model, "head", None), "norm", nn.Identity())
        pooled, maps_normed = norm(maps.mean((2, 3), keepdim=True)), norm(maps)
        cls = pooled.flatten(1)
        registers = cls.new_zeros(cls.shape[0], 0, self.embed_dim)
        return Features(cls, registers, maps_normed.flatten(2).mT, tuple(maps.shape[-2:]))


def _create(name: str, pretrained: bool, **kwargs) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        hint = f"; close names are {', '.join(close)}" if close else ""
        raise UserError(f"timm has no model {name!r}{hint}")
    try:
        model = timm.create_model(name, num_classes=0, **kwargs)
        needs = {"dynamic_img_size": True} if hasattr(model, "dynamic_img_size") else {}
        has_cls = getattr(model, "cls_token", None) is not None
        if has_cls and getattr(model, "global_pool", "token") != "token":
            needs["global_pool"] = "token"  # otherwise timm applies the final norm after pooling
        if needs or pretrained:
            kwargs = {**needs, **kwargs, "pretrained": pretrained}
            model = timm.create_model(name, num_classes=0, **kwargs)
    except (RuntimeError, TypeError, OSError) as error:
        raise UserError(f"timm:{name} could not be built: {error}") from error
    return model
