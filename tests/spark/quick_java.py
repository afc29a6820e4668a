"""Java for jobs of seconds, which are over before better code and more collectors pay; these took half of the time."""

ENVIRONMENT = {"JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
"""Every JVM of the process takes it, and says so in its first line of errors."""
