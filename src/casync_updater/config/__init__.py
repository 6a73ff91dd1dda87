"""The configuration: JSON entries and ConfigObj settings, read into frozen values."""
