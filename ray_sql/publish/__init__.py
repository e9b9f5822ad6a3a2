"""The best adapter on the Hub: checked, described by a card made from what was measured, pushed as one commit.

`check` says before training what could not be published after it, `publish` pushes a finished run, `beside_training` pushes
checkpoints meanwhile. `hub` talks to the Hub, `bundle` says what is pushed, `card` writes the model card, `merge` makes the merged model.
"""

from ray_sql.publish.background import beside_training
from ray_sql.publish.push import check, dry_run, publish
