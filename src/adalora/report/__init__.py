"""From a run's ``trace.jsonl`` and ``metrics.json`` to tables and pictures. Knows neither PEFT nor the allocator."""
