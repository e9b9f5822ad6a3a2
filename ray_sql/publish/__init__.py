"""Put the best adapter on the Hub: checked, described by a card, pushed as one commit.

`require_publishable` refuses before training what could not be published after it. `publish` pushes
a finished run, `beside_training` pushes checkpoints meanwhile. `hub` talks to the Hub, `bundle`
collects the files, `card` writes the model card from what was measured, `merge` makes the merged
model.
"""

from ray_sql.publish.background import beside_training
from ray_sql.publish.push import dry_run, publish, require_publishable
