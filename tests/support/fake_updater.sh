# Stands in for the updater's own command line in tests of the daemon.
#
# The first argument is a folder: every call is noted in its `calls`, and `COMMAND-NAME.sh`
# there, where it is, says what the call does. `report` sends a line to the daemon.
folder=$1
command=$2
shift 2
fd=
reason=
skip=()
while [[ ${1-} == -* ]]; do
    case $1 in
        --report) fd=$2; shift ;;
        --reason) reason=$2; shift ;;
        --offline) reason+=,offline ;;
        --skip=*) skip+=("${1#--skip=}") ;;
        --) shift; break ;;
    esac
    shift
done
name=${1-}

report() { printf '%s\n' "$1" >&"$fd"; }
result() { report "{\"result\": {\"outcome\": \"$1\", \"exit\": 0, \"message\": \"$1\", \"source\": \"source\", \"actions\": [${2-}]}}"; }

echo "$command $name $reason ${skip[*]}" >>"$folder/calls"
trap 'echo "end $command $name" >>"$folder/calls"' EXIT
if [[ -e $folder/$command-$name.sh ]]; then
    source "$folder/$command-$name.sh"
elif [[ $command == update ]]; then
    report '{"step": "check", "version": null}'
    result current
fi
