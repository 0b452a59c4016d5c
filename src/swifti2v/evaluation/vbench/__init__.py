"""The VBench-I2V protocol: the suite's images, the videos it asks for, their scores and the totals."""
