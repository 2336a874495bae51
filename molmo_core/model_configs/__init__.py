"""The models' configurations: what a YAML file says. Imported without torch."""
