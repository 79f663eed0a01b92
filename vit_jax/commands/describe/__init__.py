"""The describe command (train --dry_run): a run's size and cost, from its compiled step."""
