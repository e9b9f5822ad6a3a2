"""Work on a cluster.

`start` joins or starts Ray, `resources` counts what it has, `workers` runs a function on N workers.
`events` are what workers send, `channel` brings them to the driver, `ranks` lets workers agree.
`stop` ends a run in order, `device` claims what a worker computes on, and `ray_internals` holds
every use of Ray's private API.
"""

from ray_sql.cluster.channel import Channel
from ray_sql.cluster.device import claim_device, keep_freed_memory, on_gpu, set_threads
from ray_sql.cluster.events import DriverLink, Event, OnEvent
from ray_sql.cluster.ray_internals import submission
from ray_sql.cluster.resources import (
    Capacity,
    cluster_nodes,
    scaling_config,
    training_capacity,
    worker_resources,
    worker_slots,
)
from ray_sql.cluster.start import (
    address,
    dashboard,
    joins,
    leave_ray,
    start_ray,
    start_ray_in_background,
)
from ray_sql.cluster.workers import MORE_MEMORY, run_workers
