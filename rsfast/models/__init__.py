"""Networks: any CNN made switchable, and those that come with rsfast."""

from rsfast.models import official
from rsfast.models.pretrained import load_pretrained
from rsfast.models.registry import ARCHITECTURES
from rsfast.models.rsnet import RSNet, convert, create_model

__all__ = ["ARCHITECTURES", "RSNet", "convert", "create_model", "load_pretrained", "official"]
