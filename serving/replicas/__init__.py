"""The metrics of several replicas as one."""
