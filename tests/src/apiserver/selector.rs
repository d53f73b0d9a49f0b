//! Label and field selectors, as far as clients use them in lists and watches.

use super::store::Stored;

/// What a request selects by labels, fields and namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    pub(super) namespace: Option<String>,
    labels: Vec<Label>,
    fields: Vec<Field>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Label {
    Exists(String),
    Lacks(String),
    In(String, Vec<String>),
    /// An object without the label matches too.
    NotIn(String, Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    name: FieldName,
    value: String,
    equal: bool,
}

/// The fields that every resource has; the real server knows more of some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FieldName {
    Name,
    Namespace,
}

impl Selector {
    /// Reads the two parameters; an error is the message of a 400.
    pub(super) fn parse(namespace: Option<&str>, labels: &str, fields: &str) -> Result<Self, String> {
        Ok(Self {
            namespace: namespace.map(str::to_owned),
            labels: requirements(labels).into_iter().map(label).collect::<Result<_, _>>()?,
            fields: requirements(fields).into_iter().map(field).collect::<Result<_, _>>()?,
        })
    }

    /// Whether all objects (of the namespace, if one is given) are selected.
    pub(super) fn is_everything(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub(super) fn selects(&self, object: &Stored) -> bool {
        self.namespace.as_ref().is_none_or(|namespace| *namespace == object.namespace)
            && self.labels.iter().all(|label| label.selects(object))
            && self.fields.iter().all(|field| field.selects(object))
    }
}

impl Label {
    fn selects(&self, object: &Stored) -> bool {
        let value = |key: &String| object.labels.get(key);
        match self {
            Self::Exists(key) => value(key).is_some(),
            Self::Lacks(key) => value(key).is_none(),
            Self::In(key, values) => value(key).is_some_and(|value| values.contains(value)),
            Self::NotIn(key, values) => value(key).is_none_or(|value| !values.contains(value)),
        }
    }
}

impl Field {
    fn selects(&self, object: &Stored) -> bool {
        let value = match self.name {
            FieldName::Name => &object.name,
            FieldName::Namespace => &object.namespace,
        };
        (*value == self.value) == self.equal
    }
}

/// The parts between commas that are not in parentheses.
fn requirements(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    text.split(|character| {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        character == ',' && depth == 0
    })
    .map(str::trim)
    .filter(|part| !part.is_empty())
    .collect()
}

fn label(text: &str) -> Result<Label, String> {
    if let Some((head, values)) = text.split_once('(') {
        let values = values
            .strip_suffix(')')
            .ok_or_else(|| format!("unable to parse requirement: found '{text}', expected: ')'"))?;
        let values = values.split(',').map(|value| value.trim().to_owned()).collect();
        return match head.split_whitespace().collect::<Vec<_>>()[..] {
            [key, "in"] => Ok(Label::In(key_of(key)?, values)),
            [key, "notin"] => Ok(Label::NotIn(key_of(key)?, values)),
            _ => Err(format!("unable to parse requirement: found '{head}', expected: in, notin")),
        };
    }
    if let Some((key, value)) = text.split_once("!=") {
        return Ok(Label::NotIn(key_of(key)?, vec![value.trim().to_owned()]));
    }
    if let Some((key, value)) = text.split_once('=') {
        let value = value.strip_prefix('=').unwrap_or(value);
        return Ok(Label::In(key_of(key)?, vec![value.trim().to_owned()]));
    }
    match text.strip_prefix('!') {
        Some(key) => key_of(key).map(Label::Lacks),
        None => key_of(text).map(Label::Exists),
    }
}

fn key_of(text: &str) -> Result<String, String> {
    let key = text.trim();
    let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    if is_key { Ok(key.to_owned()) } else { Err(format!("unable to parse requirement: found '{text}'")) }
}

fn field(text: &str) -> Result<Field, String> {
    let (name, value, equal) = if let Some((name, value)) = text.split_once("!=") {
        (name, value, false)
    } else if let Some((name, value)) = text.split_once('=') {
        (name, value.strip_prefix('=').unwrap_or(value), true)
    } else {
        return Err(format!("invalid selector: '{text}'; can't understand '{text}'"));
    };
    let name = match name {
        "metadata.name" => FieldName::Name,
        "metadata.namespace" => FieldName::Namespace,
        other => return Err(format!("field label not supported: {other}")),
    };
    Ok(Field { name, value: value.to_owned(), equal })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::apiserver::{resource::Resource, store::Store};

    fn selects(labels: &str, fields: &str) -> bool {
        let mut store = Store::default();
        let object = json!({"kind": "Service", "metadata": {
            "name": "web", "namespace": "shop", "labels": {"app": "web", "example.com/tier": ""},
        }});
        store.put(&object).unwrap();
        let object = store.get(Resource::Services, "shop/web").unwrap();
        Selector::parse(None, labels, fields).unwrap().selects(object)
    }

    #[test]
    fn labels_are_matched_as_the_real_server_does() {
        for matching in [
            "",
            "app=web",
            "app==web",
            "app = web",
            "app",
            "example.com/tier=",
            "!gone",
            "app!=db",
            "gone!=db",
            "app in (db, web)",
            "gone notin (a,b)",
            "app in (web),example.com/tier,!gone",
        ] {
            assert!(selects(matching, ""), "{matching}");
        }
        for other in
            ["app=db", "gone", "gone=", "!app", "app!=web", "app in (a,b)", "app notin (web)", "app=web,gone"]
        {
            assert!(!selects(other, ""), "{other}");
        }
    }

    #[test]
    fn fields_are_name_and_namespace() {
        assert!(selects("", "metadata.name=web,metadata.namespace!=other"));
        assert!(!selects("", "metadata.name==other"));
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for labels in ["=x", "a b", "a in (b", "a near (b)", "a b=c"] {
            assert!(Selector::parse(None, labels, "").is_err(), "{labels}");
        }
        for fields in ["metadata.name", "spec.type=ClusterIP"] {
            assert!(Selector::parse(None, "", fields).is_err(), "{fields}");
        }
    }

    #[test]
    fn a_namespace_is_part_of_the_selection() {
        let mut store = Store::default();
        store.put(&json!({"kind": "Service", "metadata": {"name": "web", "namespace": "shop"}})).unwrap();
        let object = store.get(Resource::Services, "shop/web").unwrap();
        assert!(Selector::parse(Some("shop"), "", "").unwrap().selects(object));
        assert!(!Selector::parse(Some("other"), "", "").unwrap().selects(object));
    }
}
