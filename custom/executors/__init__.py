"""NVFlare executors: what a site does when a task arrives."""
