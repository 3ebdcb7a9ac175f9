"""The frameworks that training runs in: they ask a plan and apply it. The only place that imports their classes."""
