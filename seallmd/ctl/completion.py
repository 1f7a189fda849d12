"""seallmctl completion: shell scripts that complete its verbs, options and the names of services.

Owns the scripts. They must match the parser in `main`; a test compares them.
"""

from __future__ import annotations

BASH = r"""# bash completion of seallmctl: eval "$(seallmctl completion bash)"
_seallmctl() {
    local word="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" verb="" given=() i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${COMP_WORDS[i]}" in
            --socket) given+=(--socket "${COMP_WORDS[i+1]}"); ((i++)) ;;
            -*) ;;
            *) verb="${verb:-${COMP_WORDS[i]}}" ;;
        esac
    done
    case "$previous" in
        --socket|--config) COMPREPLY=($(compgen -f -- "$word")); return ;;
        --url|--system|--max-tokens|--temperature|--interval) return ;;
    esac
    local common="--socket --json --help"
    local verbs="cancel chat completion doctor evict list load plan requests show status top"
    if [[ -z "$verb" ]]; then
        COMPREPLY=($(compgen -W "$common --version $verbs" -- "$word"))
    elif [[ "$word" == -* ]]; then
        case "$verb" in
            chat) common+=" --url --system --max-tokens --temperature" ;;
            doctor) common+=" --config" ;;
            evict) common+=" --now" ;;
            list) common+=" --quiet" ;;
            top) common+=" --interval" ;;
        esac
        COMPREPLY=($(compgen -W "$common" -- "$word"))
    else
        case "$verb" in
            chat|evict|load|show)
                COMPREPLY=($(compgen -W "$(seallmctl "${given[@]}" list --quiet 2>/dev/null)" -- "$word"))
                __ltrimcolon_completions "$word" 2>/dev/null ;;
            completion) COMPREPLY=($(compgen -W "bash" -- "$word")) ;;
        esac
    fi
}
complete -F _seallmctl seallmctl
"""

SCRIPTS = {"bash": BASH}
