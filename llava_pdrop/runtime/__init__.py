"""The processes of a run and the devices they have: ranks, watchdog, signals, clocks."""
