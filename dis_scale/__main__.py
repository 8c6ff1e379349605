"""`python -m dis_scale COMMAND`: the `dis-scale` command with the code of the working folder, for example in a Ray job."""

from dis_scale.cli import main

main()
