"""Tests of the names around attention. A package, so that its conftest is not the one beside it."""
