"""Pure: requests, records of their streams, and the measures, capacities and tables made of them."""

__all__ = ["distributions", "measures", "record", "requests", "results", "search"]
