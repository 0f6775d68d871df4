"""From a model, however it is wrapped and sharded, to what each rank writes of it, and back. **Collective**."""
