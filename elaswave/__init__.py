"""ElasWave: elastic training in which a step survives the loss of a worker, bit for bit."""

__version__ = "0.1.0"
