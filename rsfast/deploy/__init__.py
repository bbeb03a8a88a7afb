"""Running an exported network, without PyTorch."""

from rsfast.deploy.chooser import Chooser
from rsfast.deploy.manifest import Manifest
from rsfast.deploy.network import Network, load
from rsfast.deploy.table import Table

__all__ = ["Chooser", "Manifest", "Network", "Table", "load"]
