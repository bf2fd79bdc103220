"""The version of this distribution, as clients and people are told."""

VERSION = "0.1.0"
