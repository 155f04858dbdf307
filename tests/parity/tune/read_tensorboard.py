"""Prints what TensorBoard reads of a run's folder: read_tensorboard.py RUN   (tensorboard)"""
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1] + "/tensorboard")
events.Reload()
for tag in events.Tags()["scalars"]:
    values = events.Scalars(tag)
    print(f"{tag}: {len(values)} values, step {values[0].step} to {values[-1].step}, "
          f"{values[0].value:.6g} to {values[-1].value:.6g}")
