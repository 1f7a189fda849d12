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
        --cancel|--url|--system|--max-tokens|--temperature|--interval|--last|--device) return ;;
        --requests|--clients|--prompt-tokens|--output-tokens) return ;;
    esac
    local common="--socket --json --help"
    local verbs="batches bench cancel chat completion doctor drain events evict list load pin plan reload"
    verbs+=" requests show status top undrain unpin"
    if [[ -z "$verb" ]]; then
        COMPREPLY=($(compgen -W "$common --version $verbs" -- "$word"))
    elif [[ "$word" == -* ]]; then
        case "$verb" in
            batches) common+=" --cancel" ;;
            chat) common+=" --url --system --max-tokens --temperature" ;;
            bench) common+=" --url --requests --clients --prompt-tokens --output-tokens" ;;
            doctor) common+=" --config" ;;
            drain|load|undrain) common+=" --device" ;;
            events) common+=" --follow --last" ;;
            evict) common+=" --now" ;;
            list) common+=" --quiet" ;;
            top) common+=" --interval" ;;
        esac
        COMPREPLY=($(compgen -W "$common" -- "$word"))
    else
        case "$verb" in
            bench|chat|drain|evict|load|pin|show|undrain|unpin)
                COMPREPLY=($(compgen -W "$(seallmctl "${given[@]}" list --quiet 2>/dev/null)" -- "$word"))
                __ltrimcolon_completions "$word" 2>/dev/null ;;
            completion) COMPREPLY=($(compgen -W "bash zsh" -- "$word")) ;;
        esac
    fi
}
complete -F _seallmctl seallmctl
"""

# zsh runs the completions of bash.
ZSH = """# zsh completion of seallmctl: eval "$(seallmctl completion zsh)"
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
""" + BASH.partition("\n")[2]

SCRIPTS = {"bash": BASH, "zsh": ZSH}
