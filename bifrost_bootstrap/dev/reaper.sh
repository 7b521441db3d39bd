# $1: the folder; $2: a pipe that all of the process group hold open, so that its end is theirs. SIGINT ends
# Valkey, shuts PostgreSQL down at once, and stops initdb after the step it is at, if that step does not ignore it:
# therefore again and again. A server that is killed leaves shared memory behind, and so does a PostgreSQL whose files are
# taken away: that comes only after 30 s. The last to be killed is the shell itself.
trap '' HUP INT TERM
read -r _
{
    tries=60
    while [ $((tries -= 1)) -ge 0 ]; do kill -INT 0; sleep 0.5; done
    rm -rf -- "$1"
    kill -KILL 0
} &
cat "/dev/fd/$2"
rm -rf -- "$1"
kill -KILL 0
