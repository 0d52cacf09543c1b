"""Data: loading it, dealing it to clients, and the picture of what every client got."""

from fedloom.data.load import load
from fedloom.data.partition import Federation, federate, natural_column
from fedloom.data.picture import partition_figure
from fedloom.data.shards import Shards
from fedloom.data.source import Source, Table

__all__ = ["Federation", "Shards", "Source", "Table", "federate", "load", "natural_column", "partition_figure"]
