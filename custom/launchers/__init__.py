"""How the nodes of a federation start the processes of its jobs."""
