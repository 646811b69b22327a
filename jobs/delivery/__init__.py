"""From a run folder to what serves: archive, storage, versions, channels."""
