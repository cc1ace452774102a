"""The `wisp` console command: what people do by hand, on private brokers and processes of its own."""

__all__ = ["ask", "paint", "rounds", "terminal"]
