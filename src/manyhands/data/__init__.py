"""Data: loading it, dealing it to clients, and the picture of what every client got."""

from manyhands.data.load import load
from manyhands.data.partition import Federation, federate, natural_column
from manyhands.data.picture import partition_figure
from manyhands.data.shards import Shards
from manyhands.data.source import Source, Table

__all__ = ["Federation", "Shards", "Source", "Table", "federate", "load", "natural_column", "partition_figure"]
