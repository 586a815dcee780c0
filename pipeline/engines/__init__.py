"""The clusters that a job runs on where one machine is not enough: Flink, and Spark beside it."""
