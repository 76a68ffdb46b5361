"""What ``fedct`` can do beside running jobs; each module registers its own subcommands."""
