"""How accepted updates become one."""
