"""TensorBoard: `tensorboard --logdir RUN/track/tensorboard`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.tracking import numbers, settings

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec


class Follower:
    """One event file for each part of a run that ran without a stop; steps are rounds."""

    def __init__(self, folder: Path, done: int) -> None:
        self.folder, self.done = folder, done

    def begin(self, spec: Spec, manifest: Mapping[str, Any]) -> None:
        """Opens an event file; one that goes on says that events after its last checkpoint are void."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        again = any(self.folder.iterdir())
        self.writer = EventFileWriter(str(self.folder), filename_suffix=f".from-{self.done}")
        if again:  # TensorBoard then drops what older files tell of this step and later ones
            start = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=self.done + 1, session_log=start))
        else:
            table = "\n".join(["| setting | value |", "| --- | --- |", *(f"| {n} | {v} |" for n, v in
                              settings(spec).items())])  # fmt: skip
            about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
            text = TensorProto(dtype=DT_STRING, string_val=[table.encode()])
            value = Summary.Value(tag="settings", metadata=about, tensor=text)
            self.writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))
        self.writer.flush()

    def row(self, metrics: Mapping[str, Any]) -> None:
        """A scalar for every number of the round."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(metrics).items()]
        event = Event(wall_time=time.time(), step=metrics["round"], summary=Summary(value=values))
        self.writer.add_event(event)
        self.writer.flush()

    def end(self, status: str, paths: Iterable[Path]) -> None:
        """Closes the file."""
        self.writer.close()
