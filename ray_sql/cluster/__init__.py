"""Work on a cluster: Ray joined or started (`start`), what it has (`resources`), a function run on N workers (`workers`), what they say
on the way (`channel`), how they end when the driver is told to stop (`stop`), and what a worker computes on (`device`)."""

from ray_sql.cluster.channel import Channel, OnPoint, Point, Sender, mark, note
from ray_sql.cluster.device import claim_device, keep_freed_memory, on_gpu
from ray_sql.cluster.resources import Room, capacity, holds, per_worker, room, scaling_config
from ray_sql.cluster.start import address, begin_ray, joins, leave_ray, start_ray
from ray_sql.cluster.workers import MORE_MEMORY, run_workers
